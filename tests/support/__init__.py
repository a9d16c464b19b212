"""What the tests share: cases, models, oracles, compiled programs. Imported as ``support.<module>``."""
