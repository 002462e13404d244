"""Training by several processes: on the GPUs of one machine, or of many."""
