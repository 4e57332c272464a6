"""p_knn of every token of a text, sparse, as data to train another model on."""
