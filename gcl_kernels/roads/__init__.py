"""How ``V x N`` embeddings are represented: the two roads, behind one protocol."""
