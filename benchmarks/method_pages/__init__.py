"""What the pages of the methods show of the recorded lines; `tables.py` writes it into them."""
