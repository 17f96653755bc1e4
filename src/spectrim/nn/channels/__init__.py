"""Channels that are removed together: the graph, its trial, and cutting modules."""
