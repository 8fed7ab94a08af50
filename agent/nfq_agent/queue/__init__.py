"""The queue library: packets of one NFQUEUE in, verdicts out."""
