"""The values that travel, the loop, guidance and loading. Knows no concrete solver and no stage."""
