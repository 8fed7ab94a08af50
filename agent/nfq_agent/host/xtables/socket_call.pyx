# cython: language_level=3
"""Makes libiptc and libxtables open datagram sockets where they ask for raw ones, which would take CAP_NET_RAW.

They use the socket for socket options alone, and the kernel answers those on every IP socket of a process with CAP_NET_ADMIN
(do_ipt_get_ctl and do_ipt_set_ctl in net/ipv4/netfilter/ip_tables.c). What is replaced is the address of socket(2) in the global
offset table of these libraries (elf(5), dl_iterate_phdr(3)); no other library is changed.
"""

cdef extern from *:
    """
    #include <link.h>
    #include <netinet/in.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/socket.h>
    #include <unistd.h>

    #if __SIZEOF_POINTER__ == 8
    #define SYMBOL_OF(info) ELF64_R_SYM(info)
    #else
    #define SYMBOL_OF(info) ELF32_R_SYM(info)
    #endif

    static int datagram_socket(int domain, int kind, int protocol) {
        if ((kind & 0xf) == SOCK_RAW && protocol == IPPROTO_RAW)
            return socket(domain, (kind & ~0xf) | SOCK_DGRAM, 0);
        return socket(domain, kind, protocol);
    }

    /* The C library relocates the addresses in the dynamic section on most architectures, not on all. */
    static uintptr_t at(const struct dl_phdr_info *library, ElfW(Addr) address) {
        return address < library->dlpi_addr ? library->dlpi_addr + address : address;
    }

    static int put(uintptr_t slot, int read_only) {
        uintptr_t size = (uintptr_t)sysconf(_SC_PAGESIZE);
        void *page = (void *)(slot & ~(size - 1));
        if (read_only && mprotect(page, size, PROT_READ | PROT_WRITE) != 0)
            return 0;
        *(void **)slot = (void *)datagram_socket;
        if (read_only)
            mprotect(page, size, PROT_READ);
        return 1;
    }

    static int patch(struct dl_phdr_info *library, size_t size, void *found) {
        const ElfW(Dyn) *entry = NULL;
        uintptr_t protected = 0, protected_end = 0, tables[2] = {0, 0}, sizes[2] = {0, 0}, symbols = 0, names = 0;
        (void)size;
        if (!strstr(library->dlpi_name, "/libip4tc.so") && !strstr(library->dlpi_name, "/libip6tc.so") &&
            !strstr(library->dlpi_name, "/libxtables.so"))
            return 0;
        for (int number = 0; number < library->dlpi_phnum; number++) {
            const ElfW(Phdr) *part = &library->dlpi_phdr[number];
            if (part->p_type == PT_DYNAMIC)
                entry = (const ElfW(Dyn) *)(library->dlpi_addr + part->p_vaddr);
            if (part->p_type == PT_GNU_RELRO) {
                protected = library->dlpi_addr + part->p_vaddr;
                protected_end = protected + part->p_memsz;
            }
        }
        for (; entry && entry->d_tag != DT_NULL; entry++)
            switch (entry->d_tag) {
                case DT_SYMTAB: symbols = at(library, entry->d_un.d_ptr); break;
                case DT_STRTAB: names = at(library, entry->d_un.d_ptr); break;
                case DT_JMPREL: tables[0] = at(library, entry->d_un.d_ptr); break;
                case DT_PLTRELSZ: sizes[0] = entry->d_un.d_val; break;
                case DT_RELA: tables[1] = at(library, entry->d_un.d_ptr); break;
                case DT_RELASZ: sizes[1] = entry->d_un.d_val; break;
            }
        if (!symbols || !names)
            return 0;
        for (int table = 0; table < 2; table++)
            for (uintptr_t place = 0; tables[table] && place < sizes[table]; place += sizeof(ElfW(Rela))) {
                const ElfW(Rela) *relocation = (const ElfW(Rela) *)(tables[table] + place);
                const ElfW(Sym) *symbol = (const ElfW(Sym) *)symbols + SYMBOL_OF(relocation->r_info);
                uintptr_t slot = library->dlpi_addr + relocation->r_offset;
                if (strcmp((const char *)names + symbol->st_name, "socket") == 0)
                    *(int *)found += put(slot, slot >= protected && slot < protected_end);
            }
        return 0;
    }

    static int patch_all(void) {
        int found = 0;
        dl_iterate_phdr(patch, &found);
        return found;
    }
    """
    int patch_all()


def use_datagram_sockets():
    """In how many of the libraries that are loaded now the call was replaced: 3 when both of libiptc and libxtables are there."""
    return patch_all()
