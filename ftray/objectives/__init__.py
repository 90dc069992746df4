"""What is optimised: one file per family, one row in OBJECTIVES."""
