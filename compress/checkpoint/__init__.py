"""Files of compressed models: one file per format, its reader and its writer together."""
