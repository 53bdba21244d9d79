"""What a step costs on this machine: measured, kept, predicted."""
