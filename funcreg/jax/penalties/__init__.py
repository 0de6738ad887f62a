"""One penalty per file: leaf value, subgradient and prox, and the factory."""
