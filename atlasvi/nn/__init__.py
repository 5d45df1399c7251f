"""The parts networks are made of: layers, encoder, decoder."""
