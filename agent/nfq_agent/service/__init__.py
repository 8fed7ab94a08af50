"""The running agent: its supervisor, its worker processes, its status and its control socket."""
