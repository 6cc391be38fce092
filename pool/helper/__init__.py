"""What the SSH backend runs on a host: one small program, over one channel, for all commands and files of a connection.

The modules of this folder are sent to the host as they are and run by its ``python3`` (`bundle` puts them together), so
they need Python 3.6 and the standard library only, and import nothing but one another. `wire` is what both sides speak,
`program` is the program, `family` finds and signals the processes of a command, `files` does what is asked of files.
The worker's side is `pool.backends.helper`.
"""
