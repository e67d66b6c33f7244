"""The embedded model `abacus`: its data, its training, its evaluation, its checkpoint."""
