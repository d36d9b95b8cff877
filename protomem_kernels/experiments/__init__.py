"""Does the method learn what it promises? Tables of trials, each a method and a seed, on real images and on others."""
