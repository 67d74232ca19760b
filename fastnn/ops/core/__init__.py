"""What every op shares: its declaration, its plan, and the ways of a call that follow from them."""
