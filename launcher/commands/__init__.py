"""What the commands do, by subject. Imports are made by those that need them: `ps` loads neither trio nor pyroute2."""
