"""What people would pick instead of hello, with the same checks and answers."""
