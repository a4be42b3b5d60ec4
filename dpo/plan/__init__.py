"""What a run will take, before any weight is loaded: FLOPs, memory, time, disk."""
