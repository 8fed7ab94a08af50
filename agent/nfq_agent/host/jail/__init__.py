"""The confinement of a worker: what a process that reads hostile bytes may still ask of the kernel once it has started."""
