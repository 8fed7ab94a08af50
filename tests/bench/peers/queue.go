// The same with Debian's Go binding: one verdict a packet. Its copy range and its buffer are the binding's own.
//
//	queue NUMBER MAX_LEN
package main

import (
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"syscall"

	"github.com/chifflier/nfqueue-go/nfqueue"
)

// Here, since only C keeps a pointer to it while it runs, and the collector does not know.
var queue nfqueue.Queue

func need(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	// The binding writes a line for each verdict.
	log.SetOutput(io.Discard)
	number, err := strconv.Atoi(os.Args[1])
	need(err)
	length, err := strconv.Atoi(os.Args[2])
	need(err)
	need(queue.SetCallback(func(packet *nfqueue.Payload) int {
		packet.SetVerdict(nfqueue.NF_ACCEPT)
		return 0
	}))
	need(queue.Init())
	need(queue.Bind(syscall.AF_INET))
	need(queue.CreateQueue(number))
	need(queue.SetQueueMaxLen(uint32(length)))
	fmt.Println("ready")
	need(queue.Loop())
}
