"""From files to passages in a knowledge base: reading, splitting, embedding, storing."""
