"""What is right, in plain PyTorch and plain Python, in the dtype of the inputs. Nothing here calls the package."""
