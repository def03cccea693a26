"""`compress report`: a run, or the runs of a sweep, as one HTML page that needs nothing beside itself."""
