"""Audio tokens: encoder frames in time steps of the vocoder, quantized by k-means."""
