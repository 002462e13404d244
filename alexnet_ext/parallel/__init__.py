"""Training over several processes: which rank has what, and what they exchange."""
