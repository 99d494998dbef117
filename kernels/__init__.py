"""Operations of the hot path: a plain reference, our Triton kernel, and the dispatch between them."""
