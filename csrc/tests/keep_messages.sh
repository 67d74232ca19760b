#!/bin/sh
# Runs a compiler and keeps what it says in a file beside the object: keep_messages.sh OBJECT COMPILER...
# Of a call that went well, the assembler's figures are not shown.
messages=$1.messages
shift
"$@" 2> "$messages"
status=$?
if [ $status -ne 0 ]; then
  cat "$messages" >&2
else
  grep -v -e '^ptxas info' -e '^ *[0-9]* bytes ' "$messages" >&2
fi
exit $status
