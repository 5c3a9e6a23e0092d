"""Scores of a finished run (frozen features, kNN, linear probe, table and report) and its images' influence."""
