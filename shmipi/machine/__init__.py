"""What a machine is made of: its segment, its firmware, its CPUs, its cores."""
