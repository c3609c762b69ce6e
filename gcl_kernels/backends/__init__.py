"""One module per backend. Backends never import each other; ``dispatch`` chooses among them."""
