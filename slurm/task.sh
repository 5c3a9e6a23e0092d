#!/bin/bash
# srun starts this once a task: it runs the command and tells why it ended in a way that outlasts the other tasks.
# srun returns the highest code of all tasks, and kills (137) those that are left when one fails: a task that fails for a
# reason of its own returns 200 and its code, so that job.sh sees that code and not the kill.
trap : TERM INT USR2 CONT # Slurm signals this shell too; the command decides, and the shell waits for it
"$@"
code=$?
if ((code == 130)); then exit 249; fi # interrupted: SIGINT is a user's wish
if ((code == 0 || code == 75 || code >= 128)); then exit $code; fi
exit $((200 + (code < 50 ? code : 1)))
