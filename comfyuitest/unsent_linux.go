package comfyuitest

import (
	"net"
	"syscall"
	"unsafe"
)

// unsent is how many bytes the system holds for the peer, which a reset would take back.
func unsent(conn *net.TCPConn) int {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	var left int32
	err = raw.Control(func(fd uintptr) {
		_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&left)))
	})
	if err != nil {
		return 0
	}
	return int(left)
}
