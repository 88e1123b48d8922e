"""Ways to what serves an engine: a child process, a socket, an actor on another machine."""
