"""What wires the loss into frameworks; each module is imported only by those who have its framework."""
