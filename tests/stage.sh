#!/usr/bin/env bash
# Runs one stage of `make test` and adds what it took to a file: tests/stage.sh FILE NAME COMMAND...
file=$1 name=$2
shift 2
mkdir -p "$(dirname "$file")"
TIMEFORMAT='%R %U %S'
exec 3>&1 4>&2
took=$({ time "$@" 1>&3 2>&4; } 2>&1)
status=$?
awk -v name="$name" -v failed=$status '{
  printf "%-18s %7.1f s, %7.1f s of processor time%s\n", name, $1, $2 + $3, failed ? ": FAILED" : ""
}' <<< "$took" >> "$file"
[ $status -eq 0 ] || cat "$file"
exit $status
