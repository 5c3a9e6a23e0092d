"""WHO submits: commands for a login node, the only importer of submitit. It knows tracekin; tracekin never knows it."""
