"""How good the latents and the likelihoods are on real counts, next to peers on the same split and seeds."""
