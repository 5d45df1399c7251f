"""Asking a trained module: latents, ELBO, normalised expression, always in chunks."""
