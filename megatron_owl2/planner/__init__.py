"""Planner of a run before it is queued: memory, FLOPs, traffic, time, parallel configurations."""
