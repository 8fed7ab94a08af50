"""The jail of a worker: what a process that reads hostile bytes can still ask of the kernel once it has started."""
