"""What a run needs before it is queued: memory, operations, traffic, time, and better layouts."""
