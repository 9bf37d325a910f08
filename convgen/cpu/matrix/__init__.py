"""Matrix tiles: their instructions, the copies that they read, and a convolution as products of them."""
