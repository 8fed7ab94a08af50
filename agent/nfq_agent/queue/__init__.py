"""The queue library: reads packets from one NFQUEUE and sends their verdicts."""
