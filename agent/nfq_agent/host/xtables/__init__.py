"""Rules in the kernel: the backends, and the lock that their writers share."""
