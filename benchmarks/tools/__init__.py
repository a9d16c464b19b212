"""Programs that look into one thing each; the suites are beside this folder."""
