# Completion of nfq-agent in bash, by the command itself: asked as fish asks, for one answer a line with its help behind a tab.
_nfq_agent() {
    local line=${COMP_LINE:0:COMP_POINT} word=$2 raw prefix place each
    mapfile -t COMPREPLY < <(_NFQ_AGENT_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS=$line "$1" 2>/dev/null)
    COMPREPLY=("${COMPREPLY[@]%%$'\t'*}")
    [[ ${#COMPREPLY[@]} -gt 1 || ${COMPREPLY[0]} ]] || { COMPREPLY=(); return; }
    # What is typed, from the last blank on; in quotes bash takes the whole argument for the word.
    raw=${line##*[[:blank:]]}
    [[ $word == *[[:blank:]]* || $raw == [\"\']* || ${line%"$word"} == *[\"\'] ]] && return
    # Of KEY=VALUE, bash replaces only what is behind the sign.
    prefix=${raw%"$word"}
    for place in "${!COMPREPLY[@]}"; do
        each=${COMPREPLY[place]#"$prefix"}
        # An argument with blanks begins with a quotation mark, and ends with one if it is the only answer.
        if [[ $each == *[[:blank:]\&\;\<\>\(\)\|~*?]* ]]; then
            each="'$each"
            [[ ${#COMPREPLY[@]} -gt 1 ]] || each+="'"
        fi
        COMPREPLY[place]=$each
    done
    [[ ${#COMPREPLY[@]} -gt 1 || ${COMPREPLY[0]} != *= ]] || compopt -o nospace
}
complete -o default -F _nfq_agent nfq-agent
