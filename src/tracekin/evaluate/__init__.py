"""Scores of a finished run: frozen features, weighted kNN, linear probe, bootstrap by group, table and report; influence of training images."""
