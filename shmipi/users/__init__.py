"""What IPIs are for: each a subsystem that does its job across the machine's CPUs."""
