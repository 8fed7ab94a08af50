"""The kernel's packet queue: the socket, its messages, and the compiled reader."""
