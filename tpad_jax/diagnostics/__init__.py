"""What features say: probes, ranks, mutual information."""
