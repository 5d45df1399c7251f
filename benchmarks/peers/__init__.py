"""What other libraries do on the same input: one file a peer, each run in an environment of its own."""
