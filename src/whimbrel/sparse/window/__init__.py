"""First tokens and nearest tokens: a fixed pattern."""
